"""To and from the layouts in which LLaVA models are released: Hugging Face's, and that of the original code."""
