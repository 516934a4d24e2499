"""A worker uses the cores that it was given, whatever its process did before."""


def test_a_worker_has_as_many_threads_as_its_task_has_cores(ray_cluster):
    import ray

    def count_threads() -> int:
        import torch

        from sdft_ray.cluster import begin_work

        begin_work()
        return torch.get_num_threads()

    counts = [ray.get(ray.remote(num_cpus=cpus)(count_threads).remote()) for cpus in (1, 2, 1)]
    assert counts == [1, 2, 1]
