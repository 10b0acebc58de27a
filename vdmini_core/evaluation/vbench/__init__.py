"""VBench (Huang et al. 2024, arXiv 2311.17982; image to video: VBench++, arXiv 2411.13503), the official evaluation."""
