"""What a hidden state is worth: boundary tokens, the scorer, the fused op and its slots."""
