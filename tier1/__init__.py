"""How, in the data centre: training, aggregation, versions, evaluation, governance. Never imports flytekit."""
