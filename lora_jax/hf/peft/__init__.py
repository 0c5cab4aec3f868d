"""PEFT directories: adapters read and written without loss."""
