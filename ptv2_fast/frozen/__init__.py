"""The frozen block: an encoder layer whose backward pass knows that its weights are frozen."""
