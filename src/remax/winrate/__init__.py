"""Which of two policies answers better, prompt by prompt: outputs, judges, statistics and the command."""
