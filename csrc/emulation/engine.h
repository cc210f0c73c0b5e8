// The emulation seen from the host: how blocks and threads are ordered, what went wrong, what ran.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace emulation {

constexpr int kMultiprocessors = 4;

// Which runnable thread goes on where one must wait. Preempted are RANDOM, one thread in some, and PCT, which otherwise
// runs the highest of random priorities. REVERSE starts with the last block and the last thread.
enum Order { FIFO, REVERSE, RANDOM, PCT };
void schedule(Order order, uint64_t seed);

// Compute capability `major`.0, 8 at first: what launchers that ask for it are told.
void pretend(int major);

// A launch then succeeds at once and computes nothing: what is left is the host's time.
void leave_out_launches(bool yes);

// Of the last launch that failed: kernel, block, thread, what and where.
std::string last_error();

// Launches by kernel, such as layer_norm_fwd_kernel<float, float, 4, 32, 2>, of this process.
std::map<std::string, int64_t> launches();

// What the warps of a kernel moved, since the last time it was asked: in a build with -fsanitize=thread -DFASTATTN_RECORD.
struct Traffic {
    int64_t sectors, least_sectors;         // of 32 bytes: by instruction, and what its bytes would fit into
    int64_t sectors_read, sectors_written;  // different ones, of the whole launch
    int64_t shared_passes, shared_conflicts;
};
std::map<std::string, Traffic> traffic();

}  // namespace emulation
