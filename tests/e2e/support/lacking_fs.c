/* Preloaded into a program, makes of a directory one on a file system that lacks something.
 *
 * LACKING_DIR names the directory. LACKING says what it lacks: `exclusion` (a lock is given to everybody), `locks` (there
 * are none, as on NFS without its lock manager), `sync` (files and directories are not synced). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int lacks(const char *what, int fd)
{
    const char *dir = getenv("LACKING_DIR"), *lack = getenv("LACKING");
    char link[64], path[PATH_MAX];
    if (!dir || !lack || strcmp(lack, what))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, sizeof path);
    size_t prefix = strlen(dir);
    if (len < (ssize_t)prefix || strncmp(path, dir, prefix))
        return 0;
    return len == (ssize_t)prefix || path[prefix] == '/';
}

int flock(int fd, int operation)
{
    int (*real)(int, int) = (int (*)(int, int))dlsym(RTLD_NEXT, "flock");
    if (lacks("exclusion", fd))
        return 0;
    if (!lacks("locks", fd))
        return real(fd, operation);
    errno = ENOLCK;
    return -1;
}

static int sync_unless_lacking(const char *name, int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    if (!lacks("sync", fd))
        return real(fd);
    errno = EINVAL;
    return -1;
}

int fsync(int fd) { return sync_unless_lacking("fsync", fd); }

int fdatasync(int fd) { return sync_unless_lacking("fdatasync", fd); }
