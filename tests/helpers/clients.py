"""Models of other libraries around recurrent layers; ``tests/test_integrations.py`` runs them.

    python tests/helpers/clients.py NAME RESULTS.pt

runs the one of that name in a process where ``fastseq.install()`` came before the library.
"""

import sys
from pathlib import Path

import torch


def torchrl_module(kind, turn):
    """What torchrl's LSTMModule and GRUModule make of batches with resets in mid-sequence: they
    pack for an instance of nn.LSTM, and pass ``mask=`` to any other layer."""
    from tensordict import TensorDict
    from torchrl import modules

    states = {"LSTM": ["h", "c"], "GRU": ["h"]}[kind]
    torch.manual_seed(0)
    module = getattr(modules, f"{kind}Module")(
        input_size=4,
        hidden_size=6,
        num_layers=2,
        in_keys=["x", *states],
        out_keys=["y", *(("next", state) for state in states)],
    )
    turn(module)
    rows, steps = 3, 7
    starts = torch.zeros(rows, steps, 1, dtype=torch.bool)
    starts[:, 0] = starts[0, 3] = starts[2, 5] = True
    given = {state: torch.zeros(rows, steps, 2, 6) for state in states}
    batch = TensorDict(
        {"x": torch.randn(rows, steps, 4), "is_init": starts, **given}, [rows, steps]
    )
    with modules.set_recurrent_mode(True):
        out = module(batch)
    out["y"].sum().backward()
    layer = getattr(module, kind.lower())
    found = [out["y"], *(out["next", state] for state in states)]
    return layer, [t.detach() for t in found] + [p.grad for p in module.parameters()]


def forecasting_layer(kind, turn):
    """pytorch-forecasting's subclasses of nn.LSTM and nn.GRU, which take lengths of 0."""
    from pytorch_forecasting.models.nn import rnn

    torch.manual_seed(0)
    layer = rnn.get_rnn(kind)(input_size=4, hidden_size=6, num_layers=2, batch_first=True)
    turn(layer)
    x = torch.randn(3, 5, 4)
    padded, state = layer(x, lengths=torch.tensor([5, 0, 3]), enforce_sorted=False)
    output, state = layer(x, hx=state)
    output.sum().backward()
    states = state if isinstance(state, tuple) else (state,)
    found = [padded, output, *states]
    return layer, [t.detach() for t in found] + [p.grad for p in layer.parameters()]


def forecasting_network(kind, turn):
    """pytorch-forecasting's RecurrentNetwork, of its own layer."""
    import pandas
    from pytorch_forecasting import RecurrentNetwork, TimeSeriesDataSet

    torch.manual_seed(0)
    table = pandas.DataFrame(
        {
            "time": [*range(40)] * 3,
            "group": ["a"] * 40 + ["b"] * 40 + ["c"] * 40,
            "value": torch.randn(120).numpy(),
        }
    )
    series = TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["group"],
        min_encoder_length=6,
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["time"],
    )
    torch.manual_seed(0)
    model = RecurrentNetwork.from_dataset(series, cell_type=kind, hidden_size=8, dropout=0.0)
    turn(model)
    x, _ = next(iter(series.to_dataloader(train=False, batch_size=16, num_workers=0)))
    prediction = model(x)["prediction"]
    prediction.sum().backward()
    gradients = [p.grad for p in model.rnn.parameters()]
    return model.rnn, [prediction.detach(), *gradients]


CLIENTS = {
    f"{client.__name__}-{kind}": (client, kind)
    for client in (torchrl_module, forecasting_layer, forecasting_network)
    for kind in ("LSTM", "GRU")
}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import fastseq

    fastseq.install()
    client, kind = CLIENTS[sys.argv[1]]
    layer, found = client(kind, lambda model: None)
    assert isinstance(layer, fastseq.nn.Recurrent), type(layer).__mro__
    torch.save(found, sys.argv[2])
