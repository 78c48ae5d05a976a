"""Jobs that come to a machine's CPUs, take memory and leave: no Python in between.

Each takes single pages in bulk, a stack of 8 pages in one piece, and a buffer of 16 pages that
it splits, to give half of it back at once.
"""
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free

from kmm._buddy cimport (ALL_NODES, GFP_KERNEL, PageAllocator, alloc_pages, alloc_pages_bulk,
                         free_pages, free_pages_bulk, mem_t, split_page)

cdef enum:
    PAGES = 512
    STACK = 3                       # orders
    BUFFER = 4

cdef struct job_t:
    uint64_t pages[PAGES]
    int64_t nr_pages
    int64_t stack
    int64_t buffer
    int cpu


cdef int leave(mem_t *mem, job_t *job) noexcept nogil:
    """Free all that a job has; 0, or what the allocator said against it."""
    cdef int64_t failed = 0, i
    cdef int rc = free_pages_bulk(mem, job.pages, job.nr_pages, 0, job.cpu, &failed)
    if rc == 0 and job.stack >= 0:
        rc = free_pages(mem, job.stack, STACK, job.cpu)
    for i in range(8 if job.buffer >= 0 else 16, 16):
        rc = rc or free_pages(mem, job.buffer + i, 0, job.cpu)
    job.nr_pages, job.stack, job.buffer = 0, -1, -1
    return rc


cdef int arrive(mem_t *mem, job_t *job, int nid, int cpu) noexcept nogil:
    """Take a job's memory, from the nodes nearest to nid; 0, or an errno if there is not enough."""
    cdef int rc, i
    job.cpu = cpu
    job.nr_pages = alloc_pages_bulk(mem, GFP_KERNEL, 0, nid, ALL_NODES, cpu, job.pages, PAGES)
    job.stack = alloc_pages(mem, GFP_KERNEL, STACK, nid, ALL_NODES, cpu)
    job.buffer = alloc_pages(mem, GFP_KERNEL, BUFFER, nid, ALL_NODES, cpu)
    if job.buffer >= 0:
        rc = split_page(mem, job.buffer, BUFFER)
        for i in range(8):
            rc = rc or free_pages(mem, job.buffer + i, 0, cpu)
        if rc:
            return rc
    if job.nr_pages == PAGES and job.stack >= 0 and job.buffer >= 0:
        return 0
    rc = leave(mem, job)
    return rc if rc else -12


def run(PageAllocator machine, int nid, int steps, int most):
    """Let jobs come to the CPUs in turn, each for a while; at most so many live at a time.

    :return: how many found no memory; none is left when they are counted.
    """
    cdef mem_t *mem = machine.mem
    cdef job_t *jobs = <job_t *> calloc(most, sizeof(job_t))
    cdef int i, rc = 0, turned_away = 0
    if jobs == NULL:
        raise MemoryError("jobs")
    with nogil:
        for i in range(most):
            jobs[i].stack = jobs[i].buffer = -1
        for i in range(steps + most):
            rc = leave(mem, &jobs[i % most])
            if rc == 0 and i < steps:
                rc = arrive(mem, &jobs[i % most], nid, i % mem.nr_cpus)
            if rc == -12:
                turned_away += 1
            elif rc:
                break
    free(jobs)
    if rc and rc != -12:
        raise OSError(-rc, "a block of a job could not be freed")
    return turned_away
