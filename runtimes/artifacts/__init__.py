"""What lies on disk: bundles and engines."""
