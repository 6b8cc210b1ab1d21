"""Models from MLflow's registry, fetched by a child process."""
