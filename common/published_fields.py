"""What each field of a published model's directory means here: plain data, a verdict and a reason each.

    used        the code reads it
    only        one value is implemented (null counts as that value); any other is refused by name
    noted       it steers what other programs do with the model; where it asks for something, one line says
                that nothing here follows it; `export` writes it back
    kept        nothing here needs it; `export` writes it back
    harmless    it changes no number and no token here

A field that stands in no table is printed in one line, because it may change the output, and loads:
transformers ignores such fields too.  `tests/test_published_fields.py` walks the tables, and compares them
with the fields that transformers' own classes write.
"""
from typing import NamedTuple

from common.errors import check


class Field(NamedTuple):
    verdict: str            # used, only, noted, kept or harmless
    reason: str
    values: tuple = ()      # only: those that are implemented; noted: those that ask for nothing


def _used(reason, names):
    return {name: Field("used", reason) for name in names.split()}


def _only(values, reason, names):
    return {name: Field("only", reason, values) for name in names.split()}


def _noted(values, reason, names):
    return {name: Field("noted", reason, values) for name in names.split()}


def _kept(reason, names):
    return {name: Field("kept", reason) for name in names.split()}


def _harmless(reason, names):
    return {name: Field("harmless", reason) for name in names.split()}


# ------------------------------------------------------------------------------------- generation_config.json

SAMPLING = {    # older models have these fields in config.json too
    **_noted((1.0,), "how to sample: flags of the scripts say it", "temperature top_p typical_p"),
    **_noted((0, 50), "how to sample: a flag of the scripts says it", "top_k"),
    **_noted((0.0,), "how to sample: not implemented", "min_p top_h epsilon_cutoff eta_cutoff"),
    **_noted((1.0,), "changes the logits while sampling: not implemented",
             "repetition_penalty encoder_repetition_penalty"),
    **_noted((0,), "forbids repetitions: not implemented",
             "no_repeat_ngram_size encoder_no_repeat_ngram_size"),
    **_noted((), "forbids or prefers tokens while sampling: not implemented",
             "bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias forced_bos_token_id "
             "forced_eos_token_id force_words_ids constraints exponential_decay_length_penalty"),
    **_noted((False,), "changes the logits while sampling: not implemented",
             "renormalize_logits remove_invalid_values"),
    **_noted((1.0, 0.0), "beam search, guidance and contrastive search: not implemented",
             "guidance_scale length_penalty diversity_penalty penalty_alpha"),
    **_noted((1,), "beam search: not implemented", "num_beams num_beam_groups"),
    **_noted((0,), "a shortest response: not implemented", "min_length min_new_tokens"),
    **_noted((), "ends a response by its text: responses end with one token here", "stop_strings"),
    **_noted((), "other ways to decode: not implemented", "dola_layers watermarking_config"),
    **_noted((False,), "cuts a prompt's last token: not implemented", "token_healing"),
    **_kept("bon.py and ppo.py always sample; --temperature 0 is greedy", "do_sample"),
    **_kept("--max-new-tokens says how long a response may be", "max_length max_new_tokens"),
    **_kept("--n says how many", "num_return_sequences"),
    **_kept("beam search's, which is noted above", "early_stopping"),
}
GENERATION = {
    **SAMPLING,
    **_used("responses end with the tokenizer's end of sequence; a line names further ones", "eos_token_id"),
    **_kept("the tokenizer says what begins a prompt", "bos_token_id"),
    **_kept("masks come from lengths, so no token is needed for padding", "pad_token_id"),
    **_kept("of an encoder and decoder", "decoder_start_token_id"),
    **_kept("faster sampling with the same result",
            "use_cache cache_implementation cache_config max_cache_len prefill_chunk_size compile_config "
            "disable_compile continuous_batching_config low_memory is_assistant num_assistant_tokens "
            "num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens "
            "max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind "
            "assistant_ensemble_weight speculation_type use_mtp"),
    **_kept("what a call returns, not what is sampled",
            "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate "
            "max_time"),
    **_kept("where the file came from", "_from_model_config transformers_version"),
}

# ------------------------------------------------------------------------------------------------ config.json

_COMMON = {
    **_used("the family", "model_type"),
    **_used("rows of the embedding", "vocab_size"),
    **_used("whether the LM head is the embedding; another lm_head in the file wins", "tie_word_embeddings"),
    **_used("the end of a response, where the tokenizer names none", "eos_token_id"),
    **_used("a model with another head than an LM's is refused", "architectures"),
    **_only((), "weights in fewer bits: load them with the library that made them and save them as bf16",
            "quantization_config compression_config"),
    **_only(({},), "heads were removed", "pruned_heads"),
    **_only(({},), "layers with settings of their own", "per_layer_config"),
    **_only((False,), "an encoder's states", "add_cross_attention is_encoder_decoder tie_encoder_decoder"),
    **_only((), "the model's own code, which is not run", "auto_map"),
    **{name: field for name, field in SAMPLING.items() if field.verdict == "noted"},
    **{name: field for name, field in SAMPLING.items() if field.verdict == "kept"},
    **_kept("the tokenizer says what begins a prompt", "bos_token_id"),
    **_kept("masks come from lengths, so no token is needed for padding", "pad_token_id"),
    **_kept("defaults of transformers' pipelines", "task_specific_params prefix"),
    **_kept("tokens of other kinds of models", "sep_token_id decoder_start_token_id"),
    **_harmless("the type of the weights in the file; here they are fp32, and --dtype says how to compute",
                "dtype torch_dtype use_bfloat16"),
    **_harmless("new weights only", "initializer_range init_std"),
    **_harmless("training here uses no dropout",
                "resid_pdrop embd_pdrop attn_pdrop dropout attention_dropout hidden_dropout "
                "classifier_dropout activation_dropout layerdrop summary_first_dropout"),
    **_harmless("what a call returns", "output_hidden_states output_attentions output_scores return_dict "
                "return_dict_in_generate tie_last_hidden_states"),
    **_harmless("faster or smaller with the same result",
                "use_cache chunk_size_feed_forward gradient_checkpointing torchscript tf_legacy_loss "
                "reorder_and_upcast_attn pretraining_tp attn_implementation _attn_implementation "
                "_attn_implementation_autoset"),
    **_harmless("heads for other tasks",
                "id2label label2id num_labels problem_type finetuning_task summary_type summary_use_proj "
                "summary_activation summary_proj_to_labels cross_attention_hidden_size"),
    **_harmless("all these families look back only", "is_decoder"),
    **_harmless("tokenizer.json says it", "tokenizer_class"),
    **_harmless("where the file came from",
                "transformers_version _name_or_path name_or_path _commit_hash unsloth_version unsloth_fixed"),
}
_ROPE = {
    **_used("sizes of the model", "hidden_size num_hidden_layers num_attention_heads intermediate_size "
            "max_position_embeddings"),
    **_used("how positions turn", "rope_theta rope_scaling rope_parameters"),
    **_used("the activation", "hidden_act"),
}
_LLAMA = {
    **_ROPE,
    **_used("sizes of the model", "num_key_value_heads head_dim"),
    **_used("the norms", "rms_norm_eps"),
    **_only((1, 1.0), "heads of which a part turns, in this family", "partial_rotary_factor"),
}
_QWEN = {
    **_LLAMA,
    **_used("whether all layers look at all that stands before", "layer_types"),
    **_only((False,), "attention that looks back a part of the way", "use_sliding_window"),
    **_harmless("of use_sliding_window, which is off", "sliding_window max_window_layers"),
}
CONFIG = {  # model_type: its fields
    "gpt2": {
        **_COMMON,
        **_used("sizes of the model", "n_embd n_layer n_head n_inner n_positions"),
        **_used("other names of n_embd, n_layer, n_head and n_positions",
                "hidden_size num_hidden_layers num_attention_heads max_position_embeddings"),
        **_used("the activation", "activation_function"),
        **_used("the norms", "layer_norm_epsilon"),
        **_only((True,), "unscaled attention", "scale_attn_weights"),
        **_only((False,), "attention scaled by layer", "scale_attn_by_inverse_layer_idx"),
        **_harmless("n_positions says it", "n_ctx"),
    },
    "opt": {
        **_COMMON,
        **_used("sizes of the model",
                "hidden_size num_hidden_layers num_attention_heads ffn_dim max_position_embeddings"),
        **_used("must be hidden_size: embeddings of another width are opt-350m's", "word_embed_proj_dim"),
        **_used("the activation", "activation_function"),
        **_used("biases in all linear layers or in none", "enable_bias"),
        **_only((True,), "norms behind the layers, as in opt-350m", "do_layer_norm_before"),
        **_only((False,), "no final norm", "_remove_final_layer_norm"),
        **_only((True,), "norms without weights", "layer_norm_elementwise_affine"),
    },
    "llama": {
        **_COMMON, **_LLAMA,
        **_used("biases", "attention_bias mlp_bias"),
    },
    "qwen2": {
        **_COMMON, **_QWEN,
        **_harmless("queries, keys and values have biases, whatever it says", "attention_bias mlp_bias"),
    },
    "qwen3": {
        **_COMMON, **_QWEN,
        **_only((False,), "biases, which no published Qwen3 has", "attention_bias"),
        **_harmless("MLPs have no biases, whatever it says", "mlp_bias"),
    },
    "gpt_neox": {
        **_COMMON, **_ROPE,
        **_used("how positions turn, in older files", "rotary_pct rotary_emb_base"),
        **_used("the norms", "layer_norm_eps"),
        **_used("whether attention and MLP read the same input", "use_parallel_residual"),
        **_used("biases of the attention", "attention_bias"),
    },
}
ROPE = {    # of rope_parameters and rope_scaling
    **_used("how positions turn", "rope_type type rope_theta factor low_freq_factor high_freq_factor "
            "original_max_position_embeddings partial_rotary_factor"),
    # yarn, longrope and dynamic are refused by their rope_type
    **_harmless("of types that are refused", "attention_factor beta_fast beta_slow short_factor long_factor "
                "mscale mscale_all_dim truncate"),
}

# ---------------------------------------------------------------------- tokenizer_config.json, tokenizer.json

TOKENIZER_CONFIG = {
    **_used("the end of a response", "eos_token"),
    **_used("begins a prompt where add_bos_token says so and there is no tokenizer.json",
            "bos_token add_bos_token"),
    **_used("tokens that tokenizer.json lacks, or other options of its tokens", "added_tokens_decoder"),
    **_used("are special: text that spells them stays text",
            "additional_special_tokens extra_special_tokens unk_token pad_token sep_token cls_token "
            "mask_token"),
    **_used("vocab.json and merges.txt alone are GPT-2's kind", "tokenizer_class"),
    **_only((False,), "a token behind every text", "add_eos_token"),
    **_only((False,), "a space before every text", "add_prefix_space"),
    **_only((False,), "transformers would split special tokens too", "split_special_tokens"),
    **_only((False,), "it lets transformers change the text that ids stand for",
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"),
    **_only((), "the tokenizer's own code, which is not run", "auto_map"),
    **_kept("prompts are used as they stand, so write your turns into them", "chat_template"),
    **_kept("the model's context and --max-prompt-tokens limit prompts", "max_length"),
    **_harmless("the same; export writes the model's context", "model_max_length"),
    **_kept("rows are padded on the right with masks from lengths; prompts are cut on the left",
            "padding_side truncation_side pad_token_type_id pad_to_multiple_of stride truncation_strategy"),
    **_kept("decoding replaces broken UTF-8, transformers' default", "errors"),
    **_kept("transformers ignores it for this kind of tokenizer", "clean_up_tokenization_spaces"),
    **_kept("for other tools", "model_input_names response_schema response_template chat_control_tokens "
            "processor_class use_default_system_prompt"),
    **_kept("SentencePiece's, or of offsets", "legacy sp_model_kwargs spaces_between_special_tokens "
            "trim_offsets from_slow fix_mistral_regex"),
    **_harmless("names files or where they came from; export writes its own",
                "name_or_path tokenizer_file vocab_file merges_file special_tokens_map_file init_inputs "
                "is_local local_files_only backend transformers_version"),
}
TOKENIZER = {   # tokenizer.json
    **_used("tokens beside the vocabulary", "added_tokens"),
    **_used("NFC, or nothing", "normalizer"),
    **_used("cuts a text into pieces", "pre_tokenizer"),
    **_used("a token that begins every text", "post_processor"),
    **_used("ByteLevel, or nothing", "decoder"),
    **_used("byte-level BPE", "model"),
    **_harmless("transformers sets both anew at every call", "truncation padding"),
    **_harmless("there is one", "version"),
}
BPE = {         # tokenizer.json, model
    **_used("the kind", "type"),
    **_used("tokens and their ids", "vocab"),
    **_used("pairs that become one token, the first first", "merges"),
    **_used("a piece that is a token is not merged", "ignore_merges"),
    **_used("refused where a byte has no token, because it then stands for many texts", "unk_token"),
    **_only((0, 0.0), "merges that are left out at random", "dropout"),
    **_only(("",), "marks inside words", "continuing_subword_prefix end_of_word_suffix"),
    **_only((False,), "SentencePiece's bytes", "byte_fallback"),
    **_harmless("of unk_token", "fuse_unk"),
}
ADDED_TOKEN = {     # of added_tokens and added_tokens_decoder
    **_used("what it is", "id content special normalized"),
    **_used("refused if the token is not special: it would swallow text or depend on its neighbours",
            "single_word lstrip rstrip"),
}


# --------------------------------------------------------------------------------------------------- the walk

def check_fields(where, found, table):
    """Compares the fields `found` of one file with a table.  Returns (what is noted, what is unknown), each a
    list of "name value".  Raises UserError that names a field whose value is not implemented."""
    noted, unknown = [], []
    for name, value in found.items():
        if value is None:
            continue
        field = table.get(name)
        if field is None:
            unknown.append(f"{name} {_short(value)}")
        elif field.verdict == "only":
            needed = f", only {field.values[0]!r} is" if field.values else ""
            check(value in field.values,
                  f"{where}: {name} = {_short(value)} ({field.reason}) is not implemented{needed}")
        elif field.verdict == "noted" and value not in field.values:
            noted.append(f"{name} {_short(value)}")
    return noted, unknown


def report(where, noted, unknown):
    """Prints one line for each of what `check_fields` returned."""
    if noted:
        print(f"{where} asks for {', '.join(noted)}: nothing here follows it, the scripts' flags say how to "
              "sample; export writes it back", flush=True)
    if unknown:
        print(f"{where} has fields that are not known here and are not read: {', '.join(unknown)}",
              flush=True)


def kept(found, table):
    """The fields of `found` that nothing here needs, or that are not known: `export` writes them back."""
    return {name: value for name, value in found.items()
            if value is not None and (name not in table or table[name].verdict in ("kept", "noted"))}


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
