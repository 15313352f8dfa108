"""What a program costs: roofline bounds from the model's dimensions, and loops, traffic and copies from the compiler's HLO."""
