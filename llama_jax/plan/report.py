"""Plans as text for a terminal, and as a picture: memory of one chip as stacked bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.plan.devices import GIB, Devices
from llama_jax.plan.memory import PARTS
from llama_jax.plan.search import Proposal

# Okabe and Ito's palette, which color-blind readers distinguish, in the order of PARTS.
_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#BBBBBB")


def heading(plan: Mapping[str, Any]) -> str:
    """The first line of a plan: its devices and its mesh."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan["mesh"].items() if n > 1) or "one device"
    return f"{plan['device']}: {plan['chips']} chip{'' if plan['chips'] == 1 else 's'}, mesh {mesh}"


def table(plan: dict[str, Any]) -> str:
    """A plan (`planner.Plan.to_dict`) as lines of text."""
    limit, peak = plan["limit_bytes"], plan["peak_bytes"]
    verdict = "fits" if plan["fits"] else "does not fit"
    parts = f", in {plan['accumulate']} parts" if plan["accumulate"] > 1 else ""
    lines = [
        heading(plan),
        f"  batch        {plan['batch_size']} rows of {plan['sequence_length']:,} tokens{parts}, remat {plan['remat']}",
        f"  memory       {verdict}: {peak / GIB:.1f} of {limit / GIB:.1f} GiB a device, by the {plan['by']}",
    ]
    lines += [f"    {name:<12} {plan['parts'][name] / GIB:8.2f} GiB" for name in PARTS if plan["parts"][name]]
    if plan["host_bytes"]:
        lines.append(f"    and in the host's memory {plan['host_bytes'] / GIB:.2f} GiB a device")
    if plan["by"] == "compiler":
        lines.append(f"    closed model {plan['closed_peak_bytes'] / GIB:8.2f} GiB in all")
    lines.append(f"  attention    {'; '.join(filter(None, plan['attention'].values()))}")
    lines += _collectives(plan)
    work, step = plan["flops"], plan["projection"]
    lines += [
        f"  operations   {work['model'] / 1e15:,.1f} PFLOP a step, {work['hardware'] / 1e15:,.1f} with recomputation",
        f"  projection   {step['seconds']:.2f} s a step, MFU {100 * step['mfu']:.0f} %, "
        f"{step['tokens_per_second']:,.0f} tokens/s a chip. Not measured: it assumes products at "
        f"{100 * step['assumed_efficiency']:.0f} % of the peak{_speeds(plan)}",
    ]
    if plan["compiled_flops"]:
        lines.append(f"               {plan['compiled_flops'] / 1e12:,.1f} TFLOP in the compiled products of a device")
    if plan["instead"]:
        lines += ["  instead      by the closed model, these fit:", *(f"    {flags}" for flags in plan["instead"])]
    elif not plan["fits"]:
        lines.append("  instead      nothing fits by the closed model: take more devices, or LoRA")
    if plan["proof"]:
        lines.append(f"  proof        {plan['proof']}")
    elif plan["compile_seconds"] is not None:
        lines.append(
            f"  compiled     in {plan['compile_seconds']:.0f} s of one core, with {_options(plan['compiler_options'])}"
        )
    return "\n".join(lines)


def _collectives(plan: dict[str, Any]) -> list[str]:
    """Lines of the collectives; none without a compiled program."""
    rows = [
        f"    {one['kind']:<19} {one['count']:>6} a step, {one['overlapped'] / 1e9:8.1f} GB overlapped, "
        f"{one['exposed'] / 1e9:8.1f} GB exposed{', over the network' if one['ports'] else ''}"
        for one in plan["collectives"]
    ]
    return ["  on the wire  sent by each device:", *rows] if rows else []


def _speeds(plan: dict[str, Any]) -> str:
    """The assumed speeds of the links that a step uses."""
    island = "slice" if plan["device"].lstrip("0123456789 x").startswith(("v", "tpu")) else "host"
    words = {"link": f"within a {island}", "network": f"between {island}s", "host": "to the host's memory"}
    speeds = {name: speed for name, speed in plan["assumed_speeds"].items() if name != "host" or plan["host_bytes"]}
    return "".join(f", {speed / 1e9:g} GB/s a device {words[name]}" for name, speed in speeds.items())


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "no options of ours"


def proposals(found: Sequence[Proposal], devices: Devices) -> str:
    """Proposals of a search as a table, the fastest first."""
    if not found:
        return "nothing fits by the closed model: take more devices, a smaller model, or LoRA (--config.lora.rank=16)"
    limit = devices.chip.hbm
    lines = ["by the closed model; times are projections and not measured:"]
    if devices.chip.platform == "cuda" and devices.count > 1:
        # docs/measurements/gpu-compiler.md#recipes
        lines.append("on several GPUs the compiler may need much more: plan a proposal without --search first")
    for one in found:
        step = one.projection
        lines += [
            f"  {one.memory.peak / GIB:5.1f} of {limit / GIB:.1f} GiB, {step.seconds:.2f} s a step, "
            f"MFU {100 * step.mfu:.0f} %, {step.tokens_per_second:,.0f} tokens/s a chip",
            f"    {one.flags}",
        ]
    return "\n".join(lines)


def draw(plans: Sequence[tuple[str, dict[str, Any]]], path: Path) -> Path:
    """Draw plans as stacked bars of GiB a device, with the memory of the device as a line.

    Args:
        plans: (label, plan) from the top down.
        path: File of the picture, .svg or .png.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.4 + 0.42 * len(plans)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, (_, plan) in enumerate(plans):
        left = 0.0
        for name, color in zip(PARTS, _COLORS, strict=True):
            width = plan["parts"][name] / GIB
            axes.barh(y, width, left=left, height=0.66, color=color, edgecolor="white", linewidth=0.6)
            left += width
        limit = plan["limit_bytes"] / GIB
        axes.plot([limit, limit], [y - 0.4, y + 0.4], color="black", linewidth=1.5)
        axes.text(max(left, 0) + 0.4, y, f"{plan['peak_bytes'] / GIB:.1f}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(plans)), [label for label, _ in plans], fontsize=9)
    axes.set_ylim(len(plans) - 0.4, -0.6)
    axes.set_xlabel("GiB a device at the peak; the black line is the memory of the device")
    handles = [axes.barh(0, 0, color=color, label=name) for name, color in zip(PARTS, _COLORS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with rc_context({"svg.hashsalt": "llama_jax"}):  # the same plans give the same bytes
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
