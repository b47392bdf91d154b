// The threads that kernels run on.
//
// A decode step is hundreds of short parallel regions, one after the other. Threads that sleep
// between two of them cost more than they compute; threads that spin take the cores from other
// programs, and a region that waits for a thread which the system has put aside lasts as long as
// the other program runs. So here a helper spins for a moment and then sleeps, a region never waits
// for a helper that has not come, and a helper that was put aside stays away for a while.
#pragma once

namespace baton::cpu {

using TeamWork = void (*)(const void* argument);

// Calls work(argument) on the calling thread, and meanwhile on at most `helpers` other threads;
// returns when all of these calls have. They must divide the work among themselves so that the
// caller finishes all of it where nobody else comes. With `wakes` false only helpers that are awake
// come: waking a thread takes longer than short work. `work` must not call this function.
//
// Every calling thread has its own helpers, started when they are first needed. They round, and
// flush subnormal numbers, as the calling thread does. A thread that ends leaves its helpers to the
// next one; a forked process starts new ones.
void run_on_team(int helpers, bool wakes, TeamWork work, const void* argument) noexcept;

}  // namespace baton::cpu
