"""What stands behind the command line: its options, and distillation from a configuration."""
