"""What each stage computes, in a process of its own. Knows nothing of Prefect or MLflow."""
