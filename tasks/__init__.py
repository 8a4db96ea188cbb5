"""Where prompts, references and gold rewards come from: two synthetic tasks and the paper's data sets."""
