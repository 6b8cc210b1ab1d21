"""Models from MLflow's registry, fetched by a child process.

child: the process that talks to MLflow. supervisor: its parent. source: the fetched models.
"""
