"""What any training script needs and nothing about RLHF: flags, files, checkpoints, ranks, tokenizers,
statistics."""
