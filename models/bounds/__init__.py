"""What a program costs: roofline bounds by hand, and what the compiler's HLO says."""
