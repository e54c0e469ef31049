"""What is measured beside the task's own metrics: gradient diversity, and the quality of synthetic data."""
