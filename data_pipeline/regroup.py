"""The second level of the shuffle, for corpora of so many shards that no pass can put documents into all of them.

A pass writes as many frames as there are places, from a run that must fit into memory: with thousands of places a frame
would be one document, and each shard would be gathered by billions of tiny reads from every read task's file. So `read`
puts documents into about as many groups as the square root of the number of buckets, and each task here puts one
group's documents into its buckets, which `write` then finds in one file. Documents keep their order: a corpus gives the
same shards with and without this stage.
"""

from data_pipeline.engine import Job, TaskResult
from data_pipeline.select import read_spools
from data_pipeline.spool import SpoolWriter, read_bucket, spool_paths, write_index
from megatron_joy.data.atomic import atomic_file


def regroup_tasks(job: Job) -> int:
    """A task for each group; none where `read` reaches every bucket, or where nothing is shuffled."""
    return job.plan.buckets.groups if job.pipeline.output.shuffle and job.plan.buckets.in_group > 1 else 0


def regroup_task(job: Job, group: int) -> TaskResult:
    """Put the documents of one group into its buckets, in the order of the inputs."""
    buckets = job.plan.buckets
    data, index = spool_paths(job.task_folder("regroup", group))
    documents = bytes_text = 0
    with atomic_file(data) as stream:
        spool = SpoolWriter(stream, buckets.bucket_of, buckets.in_group)
        for document in read_bucket(read_spools(job), group):
            # A copy: a view keeps its file open, and a run may be gathered from more files than a process may hold.
            document.view = document.text
            spool.add(document)
            documents += 1
            bytes_text += document.size
        spool.flush()
    write_index(index, spool.index())
    statistics = {"documents": documents, "bytes_text": bytes_text}
    return TaskResult([job.describe_scratch(data), job.describe(index)], statistics)
