/* Work split over the threads of the OpenMP runtime that the process already has.
 *
 * The runtime is not linked but given by `fd_set_runtime`: a second one beside torch's would fight it for the cores.
 */
#ifndef FD_PARALLEL_H
#define FD_PARALLEL_H

/* One piece of work: items [first, last) of the call described by `call`. */
typedef void (*fd_part)(const void *call, long first, long last);

/* Do items [0, n_items) in pieces of `n_at_once`, on all threads. */
void fd_parallel(fd_part part, const void *call, long n_items, long n_at_once);

/* How many items make a piece, so that every thread gets several. */
long fd_piece(long n_items);

#endif
