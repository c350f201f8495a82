#!/usr/bin/env python3
"""Tables and plots from the figures of bench/report.sh; nothing but Python is needed.

    bench/plot.py        # rewrites docs/benchmarks/**/*.svg and the tables in docs/benchmarks.md and README.md

docs/benchmarks/*.json are of one machine, each folder there of another, with tables of its own in docs/benchmarks.md.
"""
import html
import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "benchmarks"
TRANSPORTS = {"tcp": "TCP", "unix": "unix socket", "shm": "shared memory"}
COLOURS = {"tcp": "#8c6bb1", "unix": "#3182bd", "shm": "#31a354"}
# Figure, what it is, what is aimed at for tcp, unix, shm.
ROWS = [
    ("save_vs_files", "durable committed save / plain files + fsync", (1.0, 0.95, 0.8)),
    ("save_vs_odirect", "durable committed save / O_DIRECT files", (1.4, 1.25, 1.1)),
    ("restore_vs_odirect", "cold restore / O_DIRECT files", (1.25, 1.2, 1.1)),
    ("save_cpu_seconds_per_gb", "CPU-seconds per GB saved, client + daemon", (0.9, 0.7, 0.3)),
    ("restore_cpu_seconds_per_gb", "CPU-seconds per GB restored", (0.9, 0.7, 0.3)),
]


def load(folder):
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def value(run, name):
    return run.get(name, {}).get("median") if run else None


def spread(run, name):
    if value(run, name) is None:
        return "-"
    f = run[name]
    return f"{f['median']:.2f} ({f['min']:.2f}..{f['max']:.2f})"


def checkpoint_table(runs, suffix):
    lines = ["| | " + " | ".join(f"{t} | aim" for t in TRANSPORTS.values()) + " |", "|---" * 7 + "|"]
    for name, what, aims in ROWS:
        cells = []
        for transport, aim in zip(TRANSPORTS, aims):
            run, got = runs.get(f"{transport}-{suffix}"), None
            got = value(run, name)
            text = spread(run, name)
            cells.append(f"{'**' + text + '**' if got is not None and got <= aim else text} | {aim}")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    for name, what, scale in (("save_seconds", "save, s", 1), ("restore_seconds", "restore, s", 1),
                              ("rss_bytes_max", "daemon's memory, MiB", 1 << 20)):
        got = [value(runs.get(f"{t}-{suffix}"), name) for t in TRANSPORTS]
        lines.append(f"| {what} | " + " | ".join(f"{g / scale:.4g} | " if g is not None else "- | " for g in got) + " |")
    return "\n".join(lines)


def title(runs, suffix):
    run = next((runs[f"{t}-{suffix}"] for t in TRANSPORTS if f"{t}-{suffix}" in runs), None)
    if run is None:
        return None
    loads = [runs[f"{t}-{suffix}"].get("load_average", "?").split()[0] for t in TRANSPORTS if f"{t}-{suffix}" in runs]
    shape = f"{run['model']}, scale {run['scale']:.3g}" if "8b" in suffix else "the shape of 8b"
    return (f"{value(run, 'bytes') / (1 << 30):.2f} GiB ({shape}) from {run['ranks']} ranks, {run['rounds']} rounds; "
            f"load average at the end of each run: {', '.join(loads)}")


def bars(groups, series, heading, unit, aims=None):
    """An SVG: for each group a bar per series with its min..max, and a dash at what is aimed at."""
    width, height, left, top, bottom = 760, 300, 50, 40, 50
    top_value = max([f["max"] for g in groups for f in g[1].values() if f] + [1e-9]) * 1.08
    y = lambda v: height - bottom - (height - bottom - top) * min(v, top_value) / top_value
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
           f'font-size="12">', f'<rect width="{width}" height="{height}" fill="white"/>',
           f'<text x="{left}" y="18" font-size="14">{html.escape(heading)}</text>']
    step = next(s for s in (0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10) if top_value / s <= 8)
    for i in range(int(top_value / step) + 1):
        out.append(f'<line x1="{left}" x2="{width - 10}" y1="{y(i * step):.1f}" y2="{y(i * step):.1f}" stroke="#ddd"/>'
                   f'<text x="{left - 6}" y="{y(i * step) + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    out.append(f'<text x="10" y="{top - 8}">{html.escape(unit)}</text>')
    room = (width - left - 10) / len(groups)
    bar = room * 0.8 / len(series)
    for g, (label, figures) in enumerate(groups):
        for s, (key, (_, colour)) in enumerate(series.items()):
            f = figures.get(key)
            x = left + room * (g + 0.1) + bar * s
            if f:
                middle = x + bar * 0.45
                out.append(f'<rect x="{x:.1f}" y="{y(f["median"]):.1f}" width="{bar * 0.9:.1f}" '
                           f'height="{height - bottom - y(f["median"]):.1f}" fill="{colour}"/>'
                           f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{y(f["min"]):.1f}" y2="{y(f["max"]):.1f}" '
                           f'stroke="black"/>'
                           f'<text x="{middle:.1f}" y="{height - bottom + 13}" text-anchor="middle" font-size="10">'
                           f'{f["median"]:.2f}</text>')
            if aims and aims.get((label, key)):
                at = y(aims[(label, key)])
                out.append(f'<line x1="{x:.1f}" x2="{x + bar * 0.9:.1f}" y1="{at:.1f}" y2="{at:.1f}" stroke="#d62728" '
                           f'stroke-width="2"/>')
        out.append(f'<text x="{left + room * (g + 0.5):.1f}" y="{height - bottom + 28}" text-anchor="middle">'
                   f'{html.escape(label)}</text>')
    for s, (name, colour) in enumerate(series.values()):
        out.append(f'<rect x="{left + s * 130}" y="{height - 14}" width="10" height="10" fill="{colour}"/>'
                   f'<text x="{left + 14 + s * 130}" y="{height - 5}">{html.escape(name)}</text>')
    return "\n".join(out + ["</svg>", ""])


def plots(runs, folder):
    series = {t: (TRANSPORTS[t], COLOURS[t]) for t in TRANSPORTS}
    written = []
    for suffix in ("4", "8", "4-8b", "8-8b"):
        if title(runs, suffix) is None:
            continue
        for kind, rows, unit in (("ratios", ROWS[:3], "ratio"), ("cpu", ROWS[3:], "CPU-s/GB")):
            names = {"save_vs_files": "save / files", "save_vs_odirect": "save / O_DIRECT",
                     "restore_vs_odirect": "restore / O_DIRECT", "save_cpu_seconds_per_gb": "save",
                     "restore_cpu_seconds_per_gb": "restore"}
            groups = [(names[name], {t: runs.get(f"{t}-{suffix}", {}).get(name) for t in TRANSPORTS})
                      for name, _, _ in rows]
            aims = {(names[name], t): aim for name, _, wanted in rows for t, aim in zip(TRANSPORTS, wanted)}
            path = folder / f"{kind}-{suffix}.svg"
            path.write_text(bars(groups, series, title(runs, suffix).split(";")[0], unit, aims))
            written.append(path.name)
    return written


def others(runs):
    lines = []
    for ranks in ("1", "4", "8"):
        run = runs.get(f"async-{ranks}")
        if run:
            lines.append(f"| stall of an asynchronous save / memcpy of the same bytes, {run['ranks']} rank{'s' * (ranks != '1')} | "
                         f"{spread(run, 'stall_vs_memcpy')} | 1.2 |")
    disk = runs.get("disk")
    if disk:
        for name, what in (("write_vs_odirect", "engine alone, durable write / O_DIRECT files"),
                           ("read_vs_odirect", "engine alone, cold verified read / O_DIRECT files"),
                           ("write_cpu_seconds_per_gb", "engine alone, CPU-seconds per GB written"),
                           ("read_cpu_seconds_per_gb", "engine alone, CPU-seconds per GB read")):
            lines.append(f"| {what} | {spread(disk, name)} | |")
    steady = runs.get("steady")
    for name, what, aim in (("save_vs_odirect", "each save after an older step is freed (segments written again) / O_DIRECT files", "1.0"),
                            ("save_vs_fresh", "the same / a daemon that recycles nothing", "")):
        if steady:
            lines.append(f"| {what} | {spread(steady, name)} | {aim} |")
    tiny = runs.get("tiny")
    for name, what in (("mixed_bytes_on_disk", "disk"), ("mixed_bytes_received", "wire")):
        if tiny:
            lines.append(f"| {tiny['tensors']:,} tensors of 1 to 64 KiB beside large ones: bytes on the {what} / their bytes | "
                         f"{spread(tiny, name)} | 1.1 |")
    start = runs.get("open")
    for end in ("kill", "stop"):
        if start:
            lines.append(f"| start of the daemon to the first byte read, {start['chunks']:,} chunks, after a {end}, s (max) | "
                         f"{start[f'first_byte_seconds_after_{end}']:.2f} "
                         f"({start[f'first_byte_seconds_after_{end}_max']:.2f}) | 6 |")
    plan = runs.get("plan")
    if plan:
        size = f"{plan['ranks']:,} ranks, {plan['tensors']:,} tensors, each split over all ranks"
        lines += [f"| {size}: last seal to commit, s | {plan['commit_seconds']:.1f} | 10 |",
                  f"| the same: open and plan as one rank, s (max) | {plan['open_and_plan_seconds']:.2f} "
                  f"({plan['open_and_plan_seconds_max']:.2f}) | 2 |",
                  f"| the same: memory of the client / of the daemon, MiB | {plan['rss_bytes_max'] / (1 << 20):.0f} / "
                  f"{plan['rss_bytes_max_server'] / (1 << 20):.0f} | 256 / 512 |"]
    return "\n".join(["| | median (min..max) | aim |", "|---|---|---|", *lines]) if lines else ""


def readme_table(runs):
    if title(runs, "4") is None:
        return None
    lines = ["| | shared memory | unix socket | TCP |", "|---|---|---|---|"]
    for name, what, _ in ROWS + [("restore_vs_files", "cold restore / plain files", None)]:
        cells = [f"{value(runs.get(f'{t}-4'), name):.2f}" if value(runs.get(f"{t}-4"), name) is not None else "-"
                 for t in ("shm", "unix", "tcp")]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return title(runs, "4") + ".\n\n" + "\n".join(lines)


def between(path, name, text):
    """Replaces what stands between <!-- NAME --> and <!-- /NAME -->."""
    old = path.read_text()
    new = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + text + "\n" + m[2], old, flags=re.S)
    if f"<!-- {name} -->" not in old or f"<!-- /{name} -->" not in old:
        raise SystemExit(f"{path}: no place for what was measured (it is kept): write <!-- {name} --> and, on a line below, "
                         f"<!-- /{name} --> where the table belongs, then run bench/report.sh --render")
    path.write_text(new)


def tables(runs, folder):
    written = plots(runs, folder)
    place = folder.relative_to(ROOT / "docs")
    parts = []
    for suffix in ("4", "8", "4-8b", "8-8b"):
        if title(runs, suffix) is not None:
            parts.append(f"{title(runs, suffix)}.\n\n{checkpoint_table(runs, suffix)}\n\n"
                         + "\n".join(f"![{n}]({place}/{n})" for n in written if n in (f"ratios-{suffix}.svg", f"cpu-{suffix}.svg")))
    return "\n\n".join(parts + [others(runs)])


def main():
    runs = load(FIGURES)
    if not runs:
        raise SystemExit("docs/benchmarks holds no figures: run bench/report.sh DIR first")
    page = ROOT / "docs" / "benchmarks.md"
    between(page, "tables", tables(runs, FIGURES))
    machines = sorted(p for p in FIGURES.iterdir() if p.is_dir())
    for folder in machines:
        between(page, f"tables: {folder.name}", tables(load(folder), folder))
    if readme_table(runs):
        between(ROOT / "README.md", "speed", readme_table(runs))
    print(f"{len(runs)} runs, {len(machines)} further machines, docs/benchmarks.md and README.md")


if __name__ == "__main__":
    main()
