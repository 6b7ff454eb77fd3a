/* Helper threads, which share the pieces of one work at a time. They wait for work for a while, then sleep. */

#include <pthread.h>
#include <stdatomic.h>

#include "threads.h"

enum {
    PATIENCE = 4000, /* rounds that a helper waits for work before it sleeps, about 50 us */
    MOST_HELPERS = 63
};

static work *current; /* only the thread that holds `busy` sets it and its context */
static const void *current_context;
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;

/* Pieces that no thread has taken. A thread that has taken one may use `current`: it stays until all are done. */
static atomic_int pieces_left, pieces_done;

static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static atomic_int asleep;
static int helpers;

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Does pieces until none is left. Returns whether there was one. */
static int help(void)
{
    int left = atomic_load(&pieces_left), any = 0;
    while (left > 0)
        if (atomic_compare_exchange_weak(&pieces_left, &left, left - 1)) {
            current(current_context, left - 1);
            atomic_fetch_add(&pieces_done, 1);
            any = 1;
            left = atomic_load(&pieces_left);
        }
    return any;
}

static void *helper(void *unused)
{
    for (;;) {
        for (int i = 0; i < PATIENCE; i++) {
            if (help())
                i = 0;
            relax();
        }
        pthread_mutex_lock(&bed);
        atomic_fetch_add(&asleep, 1);
        while (atomic_load(&pieces_left) <= 0)
            pthread_cond_wait(&wake, &bed);
        atomic_fetch_sub(&asleep, 1);
        pthread_mutex_unlock(&bed);
    }
    return unused;
}

static void call_helpers(int wanted)
{
    for (pthread_t thread; helpers < wanted && helpers < MOST_HELPERS; helpers++) {
        if (pthread_create(&thread, NULL, helper, NULL))
            break;
        pthread_detach(thread);
    }
    if (atomic_load(&asleep)) {
        pthread_mutex_lock(&bed);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&bed);
    }
}

/* A forked process does not have its parent's helpers. */
static void forked(void)
{
    helpers = 0;
    atomic_store(&asleep, 0);
    atomic_store(&pieces_left, 0);
    pthread_mutex_init(&bed, NULL);
    pthread_mutex_init(&busy, NULL);
    pthread_cond_init(&wake, NULL);
}

__attribute__((constructor)) static void loaded(void) { pthread_atfork(NULL, NULL, forked); }

void share(work *work, const void *context, int pieces, int threads)
{
    if (threads < 2 || pieces < 2 || pthread_mutex_trylock(&busy)) {
        for (int piece = 0; piece < pieces; piece++)
            work(context, piece);
        return;
    }
    current = work;
    current_context = context;
    atomic_store(&pieces_done, 0);
    atomic_store(&pieces_left, pieces);
    call_helpers(threads - 1);
    help();
    while (atomic_load(&pieces_done) < pieces)
        relax();
    pthread_mutex_unlock(&busy);
}
