"""Settings of `remax demo`; the defaults fit into two minutes on one core."""

from dataclasses import dataclass

from remax.options import Options


@dataclass(frozen=True)
class DemoConfig(Options):
    """Demo"""

    output_dir: str = "remax-demo"
    """Folder for models, curves and samples; it must not hold a demo already."""
    seed: int = 0
    """Seed of everything: stories, weights, sampling, the annotators' noise."""
    num_stories: int = 6000
    """Stories of the corpus that the language model is trained on."""
    sft_steps: int = 600
    """Steps of supervised fine-tuning, of 16 stories each."""
    num_pairs: int = 1500
    """Pairs of the model's own samples that the hidden scorer labels."""
    reward_steps: int = 80
    """Steps of reward model training, of 32 pairs each."""
    max_steps: int = 60
    """ReMax steps, of 64 prompts each."""
    num_eval_prompts: int = 256
    """Held-out prompts for the figures before and after."""

    def _check(self) -> None:
        for name in ("num_stories", "sft_steps", "num_pairs", "reward_steps", "max_steps", "num_eval_prompts"):
            self._require(getattr(self, name) > 0, name, "nothing would be trained or measured", "1 or more")
        self._require(self.num_stories >= 64, "num_stories", "a ReMax step takes 64 openings", "64 or more")
        self._require(self.num_pairs >= 300, "num_pairs", "200 of them are held out", "300 or more")
        self._require(
            self.num_pairs <= self.num_stories,
            "num_pairs",
            f"each needs an opening of its own, and --num_stories is {self.num_stories}",
            f"{self.num_stories} or less",
        )
