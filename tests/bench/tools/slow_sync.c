/* Preloaded into a program, makes each of its syncs take longer: the disk of many machines syncs faster than most disks.
 *
 * SLOW_SYNC_US says by how many microseconds. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

static void wait_first(void)
{
    const char *text = getenv("SLOW_SYNC_US");
    long us = text ? atol(text) : 0;
    struct timespec time = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&time, NULL);
}

static int sync_slowly(const char *name, int fd)
{
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    wait_first();
    return sync(fd);
}

int fdatasync(int fd) { return sync_slowly("fdatasync", fd); }

int fsync(int fd) { return sync_slowly("fsync", fd); }
