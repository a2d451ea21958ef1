"""One look: time, device-busy time and host profile of ours compiled/not against non-private eager/compiled."""
import sys, os, time, json, logging, cProfile, pstats, io, statistics
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import torch
from functools import partial
from benchmarks.gradient_models import SIZES, build
from benchmarks.gpu.steps import uniform_case, ragged_case, padded_batches, plain_step, fused_step, median_clip
from benchmarks.gpu.measure import seconds, kernels_of, peak_memory
from fedsim.gradients import clipped_sum, CausalLanguageModel
logging.basicConfig(level=logging.INFO)
name, cases, ways, tokens, out = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(","), int(sys.argv[4]), sys.argv[5]
cuda = torch.cuda.is_available()
dev = torch.device("cuda" if cuda else "cpu"); ac = torch.bfloat16 if cuda else None
if cuda: print(torch.cuda.get_device_name(), flush=True)
size = SIZES[name]; model = build(size, dev, False)
base = torch.compile(model, dynamic=False) if "base" in ways else None
if not cuda:
    from fedsim.gradients import compiled; compiled.BACKEND = "aot_eager"
def ours(case, clip, compiled):
    return clipped_sum(model, case.rows, case.unit_ids, clip, objective=CausalLanguageModel(), autocast=ac, max_tokens=tokens or None, compiled=compiled)
for c in cases:
    n = size.users if cuda else 6
    case = ragged_case(size, n) if c == "ragged" else uniform_case(size, n * (4 if c == "256x1" else 1), int(c.split("x")[1]))
    clip = median_clip(model, case, ac, tokens or None)
    steps = {}
    for w in ways:
        if w == "ours": steps[w] = partial(ours, case, clip, True)
        if w == "plain": steps[w] = partial(ours, case, clip, False)
        if w == "eager": steps[w] = partial(plain_step, model, padded_batches(case, tokens or 8192, dev), len(case.rows), ac)
        if w == "base": steps[w] = partial(plain_step, base, padded_batches(case, tokens or 8192, dev), len(case.rows), ac)
    results = {}
    for w, step in list(steps.items()):
        t = time.time()
        try: results[w] = step(); step()
        except Exception as e:
            import traceback; traceback.print_exc(); steps.pop(w); continue
        print(c, w, "first two", round(time.time() - t, 1), flush=True)
    if "ours" in results and "plain" in results:
        a, b = results["ours"], results["plain"]
        print("agree", float((a.norms / b.norms - 1).abs().max()), float((a.total - b.total).norm() / b.total.norm()), float((a.losses - b.losses).abs().max()), flush=True)
    results.clear()
    times = {w: [] for w in steps}
    for _ in range(5):
        for w, step in steps.items(): times[w].append(1e3 * seconds(step, dev))
    for w, step in steps.items():
        peak = peak_memory(step, dev)
        host = time.perf_counter(); step(); host = time.perf_counter() - host
        if cuda: torch.cuda.synchronize()
        number, table = kernels_of(step, dev)
        busy = sum(ms for *_, ms in table)
        print(json.dumps(dict(model=name, case=c, way=w, ms=round(statistics.median(times[w]), 1), all=[round(t,1) for t in times[w]], busy=round(busy, 1), kernels=number, peak=round(peak / 2**20), host=round(1e3 * host, 1))), flush=True)
        with open(f"{out}/k-{name}-{c}-{w}.txt", "w") as f:
            for k, n_, ms in table[:45]: f.write(f"{ms:9.3f} {n_:5d} {k[:200]}\n")
            if w == "ours":
                prof = cProfile.Profile(); prof.enable(); step(); prof.disable()
                s = io.StringIO(); st = pstats.Stats(prof, stream=s); st.sort_stats("tottime").print_stats(28); st.sort_stats("cumulative").print_stats(40)
                f.write(s.getvalue())
