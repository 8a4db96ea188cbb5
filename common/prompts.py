"""Alpaca's prompt of an instruction, for its data sets and for outputs in AlpacaEval's format."""


def instruction_prompt(instruction, given=""):
    """The Alpaca prompt of an instruction, with or without an input."""
    more, given = (", paired with an input that provides further context",
                   f"\n\n### Input:\n{given}") if given else ("", "")
    return (f"Below is an instruction that describes a task{more}. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{instruction}{given}\n\n### Response:")
