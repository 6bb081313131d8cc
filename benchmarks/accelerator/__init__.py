"""What an accelerator changes: accuracy of products, price of factorisations, ratios of steps."""
