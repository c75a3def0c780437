"""The paper's comparison (arXiv 2511.14981): its networks, data, recipe, and the whole grid.

    python -m benchmarks.paper run --dataset cifar100 --teacher resnet34 --student resnet9 \\
        --method features --layers paper_q --seeds 3 --data-root DATA --download
    python -m benchmarks.paper grid --list
    python -m benchmarks.paper grid --data-root DATA
    python -m benchmarks.paper grid --tabulate

``run`` trains the teacher of a data set once, then one student a seed. ``grid`` does this for all
combinations of three data sets, four pairs of networks and all methods, after an estimate of time
and memory from a few steps on the machine at hand; killed, it goes on where it was.

After the paper are the pairs of networks, the layers picked by Q (``paper_q``), by one term alone
(``paper_s``, ``paper_i``, ``paper_e``, ``paper_ie``: the ablation) and evenly spaced
(``paper_even``), 50 epochs of AdamW in batches of 128 with the rates that its text states, three
seeds. ``--layers auto`` takes the four layers of highest Q of this teacher, scored as the paper's
were (``protocol="paper"``). The networks have what is known of the released ones beyond stems for
small images: a max-pool behind the ResNets' stem and stride 2 in MobileNet's at 64 pixels, VGG
pooled to 1x1, transformers classified from the mean token, ResNet blocks whose last batch norm
starts at zero, new stems of pretrained teachers trained at the body's rate.

What differs from the paper
---------------------------
- Accuracy is that of the *last* epoch, never of the best on the test images; every seed counts, and
  those whose loss became NaN are named. With ``--validation`` a fifth of the training images, at
  most 5,000, is set apart, and the best epoch on them is told beside the last one.
- Teachers start from ImageNet's weights where their file is given (``--imagenet-weights``), else
  from random ones, which the paper's did not.
- The one-cycle schedule reaches its end, no part of an epoch is dropped, and the largest rates are
  those of the text: the released runs peak at 0.05 (ResNet9, MobileNetV2) and 0.01 (VGG11, ViT-ET).
- Not known, so ours: no max-pool in ResNets at 32 pixels, an average in VGG's last pooling, the
  class token in the transformers' mean, MobileNet's batch norms as torchvision begins them.
- Transformers' layers are numbered here from the first block, there from the embedding: the paper's
  9 is block 8. Tables and files name layers, not numbers.

What can be run where
---------------------
- On a graphics card the whole grid is meant to run, and under ``torchrun --nproc-per-node N -m
  benchmarks.paper`` on several. So far it has been run on processors alone.
- On a processor the estimate tells what is within reach, such as ``--pairs resnet34-resnet9``.
- Trials are short (``--subset 200 --epochs 1``). Whatever differs from the paper's recipe is in the
  names of the files, so that nothing is mixed up.
- Without a network, ``--dataset npz:FILE`` takes an archive of images of 32 or 64 pixels.

CIFAR is read, and fetched with ``--download``, by torchvision; Tiny ImageNet from the folder
``tiny-imagenet-200`` of its published archive, whose ``val`` images serve as the test, since those
of ``test`` have no labels.

Every finished run is a JSON file in ``benchmarks/results/paper/``: accuracy, history, options,
seconds, machine. Checkpoints and the teachers' weights are in ``.paper-work/``.
"""
