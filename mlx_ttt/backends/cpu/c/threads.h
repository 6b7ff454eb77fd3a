/* Work that several threads share. */

#pragma once

/* Does piece number `piece` of some work. Pieces may be done in any order, and at the same time. */
typedef void work(const void *context, int piece);

/* Does pieces 0 ... pieces - 1 in at most `threads` threads, of which the caller is one. */
void share(work *work, const void *context, int pieces, int threads);
