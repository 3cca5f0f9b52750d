from hypothesis import settings

# Machines that run the tests may be busy: no deadline. The same examples on every run.
settings.register_profile("kernels", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("kernels")
