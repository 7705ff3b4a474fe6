"""What happens to the workers' rows in one step."""
