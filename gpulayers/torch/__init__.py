"""Drop-ins for ``torch.nn`` over gpulayers' ops: each class is a subclass of torch's own."""

from gpulayers.torch.conv import Conv2d
from gpulayers.torch.dropout import Dropout
from gpulayers.torch.linear import Flatten, Linear
from gpulayers.torch.norm import BatchNorm1d, BatchNorm2d, LayerNorm, RMSNorm
from gpulayers.torch.softmax import LogSoftmax, Softmax

# After the drop-ins: what is made of them.
from gpulayers.torch import optim  # isort: skip
