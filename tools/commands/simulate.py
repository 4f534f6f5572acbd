"""`skerry simulate`: how large a cluster one broker and one edge service can carry."""

from __future__ import annotations

import json
import signal
from typing import Any

import click

_SHARE = click.FloatRange(0.0, 0.9)


@click.command()
@click.option("--devices", type=click.IntRange(10, 100_000), default=1000, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True)
@click.option("--away", type=_SHARE, default=0.05, show_default=True, help="Share that is away in each round.")
@click.option("--cut", type=_SHARE, default=0.02, show_default=True, help="Share that is cut off while answering.")
@click.option("--hostile", type=_SHARE, default=0.0, show_default=True, help="Share that says one need never ask.")
@click.option(
    "--spread",
    type=click.FloatRange(0.0, 3600.0),
    default=5.0,
    show_default=True,
    help="Seconds over which the edge spreads the answers.",
)
@click.option(
    "--delay",
    type=click.FloatRange(0.0, 60.0),
    default=0.5,
    show_default=True,
    help="Mean seconds by which an answer is late on top, exponentially distributed.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--broker", help="Use the broker at this URL, mqtt://host:1883, that asks for no password.")
@click.option("--scaling/--no-scaling", default=True, show_default=True, help="Run a tenth first, to compare costs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def simulate(broker: str | None, scaling: bool, as_json: bool, **plan: Any) -> None:
    """Run rounds of a simulated fleet: many devices, a real broker (Mosquitto) and the real edge service.

    Each device is an MQTT client with a connection and a session of its own. It has no model: it learns, as a real one
    does, from steps that are drawn at random, and devices differ in what they meet. Some are away and answer late, some
    are cut off in the middle and send again, all are late by chance.

    Broker and edge are started here, on this machine, and stopped at the end.

    \b
    Examples:
      skerry simulate
      skerry simulate --devices 10000 --json
      skerry simulate --devices 500 --rounds 6 --hostile 0.2 --no-scaling
    """
    from tools.simulate.measure import simulate as run
    from tools.simulate.member import Plan

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no child stays behind
    result = run(Plan(**plan), broker, scaling, lambda line: click.echo(click.style(line, dim=True), err=True))
    click.echo(json.dumps(result) if as_json else _text(result))


def _text(of: dict[str, Any]) -> str:
    lines = [
        f"{of['devices']:,} devices, {of['rounds']} rounds, {of['present']:,} of the devices present in each",
        "",
        f"a round        {of['round_s']:.1f} s at most, from its call to its result ({_list(of['rounds_s'], '.1f')})",
        f"counted        {_list(of['counted'], ',')} devices",
        f"lost updates   {of['lost_updates']} of {of['updates_acknowledged']:,} that the broker acknowledged; "
        f"{of['connections_cut']:,} connections cut; refused: {_refused(of['refused'])}",
        f"edge           {of['edge_rss_mb']:.0f} MB at its peak",
        "",
        *_costs(of),
        "",
        f"thresholds     {of['off_start']:.3f} off each device's best one before, {of['off_alone']:.3f} by its own",
        f"               data alone, {_list(of['off'], '.3f')} after each round",
        f"agreed         {_list(of['agreed'], '.3f')}: {_convergence(of['rounds_to_convergence'])}",
    ]
    return "\n".join(lines)


def _costs(of: dict[str, Any]) -> list[str]:
    names = {
        "bytes": "PUBLISH packets, call, update and result",
        "wire_bytes": "all of TCP and IP, acknowledgements and reconnections",
        "cpu_ms": "CPU of edge and broker in rounds, ms",
    }
    keys = {name: f"{name}_per_device_round" for name in names}
    if of["scaling"] is None:
        return ["per device and round", *(f"  {text:<55} {of[keys[name]]:>10,.4g}" for name, text in names.items())]
    small, large = of["scaling"]["devices"]
    lines = [f"{'per device and round':<57} {small:>10,} {large:>10,}      ratio"]
    for name, text in names.items():
        one, other = of["scaling"][keys[name]]
        lines.append(f"  {text:<55} {one:>10,.4g} {other:>10,.4g} {of['scaling'][f'{name}_ratio']:>10.2f}")
    return lines


def _convergence(round: int | None) -> str:
    return "still moving in the last round" if round is None else f"as good as still from round {round} on"


def _refused(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "none"


def _list(values: list[Any], form: str) -> str:
    return ", ".join(format(value, form) for value in values)
