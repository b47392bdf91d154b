// The threads that kernels run on.
//
// A decode step is hundreds of short parallel regions, one after the other. If threads sleep
// between them, waking costs more than the work; if threads spin, they take the cores from other
// programs, and a region that waits for a preempted thread lasts as long as the other program runs.
// So a helper spins for a moment and then sleeps, a region never waits for a helper that has not
// entered it, and a helper that was preempted stays away for a while.
#pragma once

namespace baton::cpu {

using TeamWork = void (*)(const void* argument);

// Calls work(argument) on the calling thread and, at the same time, on at most `helpers` other
// threads; returns when all of these calls have returned. The calls must divide the work so that
// the caller finishes all of it if nobody else comes. With `wakes` false only helpers that are
// awake come: waking a thread takes longer than short work. `work` must not call this function.
//
// Every calling thread has its own helpers, started when they are first needed. They round, and
// flush subnormal numbers, as the calling thread does. When a thread ends, the next new thread
// takes over its helpers; a forked process starts new ones.
void run_on_team(int helpers, bool wakes, TeamWork work, const void* argument) noexcept;

}  // namespace baton::cpu
