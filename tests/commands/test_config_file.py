"""Settings from a file: what a run saves can be given back, options come first, slips are named."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from ats_stream.commands import train
from ats_stream.commands.config_file import apply_config_file
from ats_stream.commands.options import config_from
from ats_stream.errors import InputError, MissingFileError
from ats_stream.models import ModelConfig
from ats_stream.workers import ClusterConfig, RunConfig, SamplerConfig, TrainerConfig

if TYPE_CHECKING:
    from pathlib import Path


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return parser.parse_args(["table.csv", "--out", "run", *words])


def test_a_saved_configuration_given_back_is_the_same(tmp_path: Path) -> None:
    saved = RunConfig(
        model=ModelConfig(num_classes=2, attention_width=5, centred=True),
        sampler=SamplerConfig(num_patches=7, prior_label="tissue", scheme="balanced", seed=4),
        trainer=TrainerConfig(lr=3e-4, schedule="cosine", class_weights=True, seed=4, batch_size=2),
        classes=("b", "a"),
    )
    saved.write(tmp_path)
    arguments = parse("--config", str(tmp_path / "config.yaml"))
    assert apply_config_file(arguments) == ("b", "a")
    assert config_from(arguments, ModelConfig) == saved.model
    assert config_from(arguments, SamplerConfig) == saved.sampler
    assert config_from(arguments, TrainerConfig) == saved.trainer


def test_options_come_before_the_file_and_the_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("trainer: {lr: 1e-3, num_epochs: 3}\ncluster: {executor: ray, num_ranks: 4}\n")
    arguments = parse("--config", str(file), "--epochs", "5", "--ranks", "1")
    assert apply_config_file(arguments) is None
    trainer = config_from(arguments, TrainerConfig)
    assert (trainer.lr, trainer.num_epochs, trainer.batch_size) == (1e-3, 5, TrainerConfig().batch_size)
    assert config_from(arguments, ClusterConfig) == ClusterConfig(executor="ray", num_ranks=1)


def test_no_option_has_a_default_of_its_own_that_would_hide_the_file() -> None:
    fields = {
        field.name
        for config in (ModelConfig, SamplerConfig, TrainerConfig, ClusterConfig)
        for field in dataclasses.fields(config)
    }
    assert not fields & set(vars(parse()))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("trainer: {learning_rate: 1}", "no setting trainer.learning_rate; there are "),
        ("trainer: {batchsize: 1}", "no setting trainer.batchsize; did you mean trainer.batch_size?"),
        ("trianer: {lr: 1}", "no setting trianer; did you mean trainer?"),
        ("trainer: 3", "trainer must hold names and values, got 3"),
        ("trainer: {lr: fast}", "trainer.lr must be float, got 'fast'"),
        ("trainer: {num_epochs: 1.5}", "trainer.num_epochs must be int, got 1.5"),
        ("trainer: {num_epochs: true}", "trainer.num_epochs must be int, got True"),
        ("trainer: {class_weights: 1}", "trainer.class_weights must be bool, got 1"),
        ("sampler: {prior_label: 1}", "sampler.prior_label must be str | None, got 1"),
        ("sampler: {seed: 1}\ntrainer: {seed: 2}", "sampler.seed is 1 and trainer.seed 2"),
        ("classes: tumor", "classes must be a list of names, got 'tumor'"),
        ("[1]", "a configuration has sections, got list"),
        ("a: [", "cannot read it"),
        ("!!python/object/apply:os.system ['true']", "cannot read it"),
    ],
)
def test_slips_are_named(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        apply_config_file(parse("--config", str(file)))
    assert says in str(caught.value)
    assert str(file) in str(caught.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such configuration"):
        apply_config_file(parse("--config", str(tmp_path / "c.yaml")))


def test_the_types_of_all_fields_that_options_set_are_checked() -> None:
    from ats_stream.commands.config_file import _TYPES

    kinds: set[Any] = {
        str(field.type)
        for config in (ModelConfig, SamplerConfig, TrainerConfig, ClusterConfig)
        for field in dataclasses.fields(config)
    }
    assert kinds <= _TYPES.keys()
