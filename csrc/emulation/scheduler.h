// What engine.cpp gives to instructions that keep a state of their own, which are in sm90.cpp.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulation.h"

#ifdef FASTATTN_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulation {

constexpr unsigned char kPoison = 0xff;  // NaN in every float type

// What TSAN must be told. Kernels are instrumented for it and the engine is not: its own bookkeeping orders nothing, what
// a barrier orders is said by release and acquire.
#ifdef FASTATTN_TSAN
inline void release(void* by) { __tsan_release(by); }
inline void acquire(void* by) { __tsan_acquire(by); }
// Around what a fiber does in the engine: library functions such as memmove are instrumented even so.
struct Unseen {
    Unseen() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unseen() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
};
#else
inline void release(void*) {}
inline void acquire(void*) {}
struct Unseen {
    ~Unseen() {}
};
#endif

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(Place place);
inline bool operator==(Place a, Place b) { return a.line == b.line && strcmp(a.file, b.file) == 0; }

// Where the running thread stands in its block.
struct Running {
    int thread, warp, lane, threads;
};
Running running();

// What instructions keep for a block, from the first of them to the block's end.
struct BlockState {
    virtual ~BlockState() = default;
    virtual void thread_exits(int thread) = 0;
    virtual void block_ends() = 0;
    virtual std::string waited_for() const = 0;  // what a deadlock's sentence ends with
};
std::unique_ptr<BlockState>& block_state();

// Until `ready` holds, which it still does on return. Who may have made it so says something_changed.
void wait_until(const char* name, const std::function<bool()>& ready, Place place);
void something_changed();
void give_way(const char* name, Place place);

// Whether what may happen at any time happens at once; later is when threads wait, or at a moment that chance decides.
bool perhaps_now();
void do_later(std::function<void()> work);

struct SharedVariable {
    const void* key;
    const char* name;
    unsigned char* start;
    size_t bytes;
};
const std::vector<SharedVariable>& shared_variables();
struct Span {
    unsigned char* start;
    size_t bytes;
};
Span shared_memory();  // that they are spread over

}  // namespace emulation
