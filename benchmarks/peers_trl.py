"""TRL's GRPO trainer, what one would run instead of this package, for `--peers`."""

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import peft
import tokenizers
import torch
import transformers
import trl

from benchmarks.peers import DEVICE


def trl_grpo(
    model: Any,
    prompts: np.ndarray,
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
    beta: float,
    entropy: float,
    micro_batch: int,
    sites: list[str],
    steps: int,
    folder: str,
) -> list[float]:
    """Trains with TRL's ``GRPOTrainer`` and times its optimizer steps.

    A LoRA of rank 1 on the same maps as ours, completions by transformers, one pass over
    them, and as reference policy the same model without the LoRA.  None of the completions ends
    before ``max_new_tokens``.

    Args:
      model: from `load`; what is trained is a copy.
      prompts: integers ``[P, S]``, without padding; every step has all of them.
      num_samples: ``G``, completions of each prompt.
      max_new_tokens: ``N``.
      temperature: above 0.
      top_p: nucleus mass in (0, 1].
      repetition_penalty: at least 1, over the prompt and the completion.
      beta: weight of the KL term; 0 leaves the reference out.
      entropy: weight of the bonus on the mean entropy of the tokens.
      micro_batch: completions in one forward and backward pass; divides ``P * G``.
      sites: names of the adapted maps in the model's base.
      steps: optimizer steps.
      folder: TRL's output directory; nothing is saved.

    Returns:
      seconds of each step, from before the completions are sampled until after the update; the
      first ones warm up.

    Raises:
      ValueError: a micro-batch that does not divide the step.
    """
    completions = len(prompts) * num_samples
    if completions % micro_batch:
        raise ValueError(f"micro_batch={micro_batch}: must divide {completions} completions.")
    tokenizer = _word_tokenizer(model.config.vocab_size)
    texts = [" ".join(f"w{token}" for token in row) for row in np.asarray(prompts)]
    timer = _StepTimer()
    trained = copy.deepcopy(model)
    # TRL ends completions at the model's own end token besides the tokenizer's.
    trained.generation_config.eos_token_id = None
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        trainer = trl.GRPOTrainer(
            model=trained,
            reward_funcs=_odd_words,
            args=trl.GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=completions // micro_batch,
                steps_per_generation=completions // micro_batch,
                num_iterations=1,
                num_generations=num_samples,
                max_completion_length=max_new_tokens,
                mask_truncated_completions=False,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                repetition_penalty=repetition_penalty,
                beta=beta,
                entropy_coef=entropy,
                learning_rate=5e-5,
                lr_scheduler_type="constant",
                max_grad_norm=0.5,
                shuffle_dataset=False,
                disable_dropout=True,
                gradient_checkpointing=False,
                bf16=next(model.parameters()).dtype == torch.bfloat16,
                fp16=next(model.parameters()).dtype == torch.float16,
                use_cpu=DEVICE.type == "cpu",
                dataloader_pin_memory=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": texts * steps}),
            processing_class=tokenizer,
            callbacks=[timer],
            peft_config=peft.LoraConfig(
                r=1,
                lora_alpha=1,
                target_modules=sites,
                fan_in_fan_out=not isinstance(
                    model.base_model.get_submodule(sites[0]), torch.nn.Linear
                ),
                task_type="CAUSAL_LM",
            ),
        )
        # With the progress bar off, transformers prints every log instead.
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return timer.seconds


class _StepTimer(transformers.TrainerCallback):
    """Seconds of each optimizer step; sampling is a part of its first ``training_step``."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the first micro-batch."""
        _wait()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the update."""
        _wait()
        self.seconds.append(time.perf_counter() - self.begin)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _odd_words(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Reward: the share of odd tokens, which differs within a group even for random weights."""
    return [sum(token % 2 for token in tokens) / len(tokens) for tokens in completion_ids]


def _word_tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the words ``w0 w1 ...``; its end token is beyond what the model can sample."""
    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' messages and progress bars off the terminal."""
    level, bars = transformers.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
