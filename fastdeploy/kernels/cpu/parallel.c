#include "parallel.h"

#include <stdatomic.h>

typedef void (*fork_join)(void (*)(void *), void *, unsigned, unsigned);

static struct {
    fork_join gomp_parallel;
    int (*omp_get_max_threads)(void);
} runtime;

/* Pieces for each thread: more of them even out a disturbed core, and cost a locked addition each. */
enum { PIECES = 4 };

struct shared {
    fd_part part;
    const void *call;
    long n_items, n_at_once;
    _Atomic long next;
};

void fd_set_runtime(void *gomp_parallel, void *omp_get_max_threads)
{
    runtime.gomp_parallel = (fork_join)gomp_parallel;
    runtime.omp_get_max_threads = (int (*)(void))omp_get_max_threads;
}

long fd_piece(long n_items)
{
    const long n_pieces = (long)runtime.omp_get_max_threads() * PIECES;
    return n_items > n_pieces ? n_items / n_pieces : 1;
}

static void take_pieces(void *argument)
{
    struct shared *work = argument;
    for (;;) {
        long first = atomic_fetch_add_explicit(&work->next, work->n_at_once, memory_order_relaxed);
        if (first >= work->n_items)
            return;
        long last = first + work->n_at_once;
        work->part(work->call, first, last < work->n_items ? last : work->n_items);
    }
}

void fd_parallel(fd_part part, const void *call, long n_items, long n_at_once)
{
    if (n_items <= n_at_once || runtime.omp_get_max_threads() == 1) {
        if (n_items > 0)
            part(call, 0, n_items);
        return;
    }
    struct shared work = {part, call, n_items, n_at_once, 0};
    runtime.gomp_parallel(take_pieces, &work, 0, 0);
}
