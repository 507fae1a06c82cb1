"""A virtual GPU: its clock, its speed, and the traces that its model plays. Knows no engine."""
