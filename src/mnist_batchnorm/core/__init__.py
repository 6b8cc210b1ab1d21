"""What every part uses: errors, files, parameters, paths, child processes."""
