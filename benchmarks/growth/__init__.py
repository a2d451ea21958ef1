"""What a round and a start cost as the population grows: `python -m benchmarks.growth`.

Stores of 10⁵, 10⁶ and 10⁷ users of few short rows are written as files. On each, in a process of its own, a run's own
start and rounds are timed: both algorithms, the same expected batch, clients in the same process, a model of a few
parameters, so that what shows is not gradients.

Start: the store is opened by server and worker, its users counted, a plan drafted (noise given, not calibrated),
held-out rows chosen, alarms asked, the round made and its first units drawn. Round: sampled, charged, sent, looked up,
summed, noised, stepped; the first ones are not counted. Both were done before on a store of a few users in the same
process: what libraries take when they are first used is no matter of users.

Times are processor time of the whole process, all threads. Memory of a start is the growth of the resident memory at
its highest, pages of mapped files counted; memory of a round is what it allocates at most beside what stays, by
tracemalloc, in rounds that are not timed. Ends with one JSON line.
"""
