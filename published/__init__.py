"""What only a published model needs: its weights and its tokenizer."""
