"""`python -m timm_synermix path/to/train.py ...`: SynerMix in somebody's own timm script."""

from timm_synermix.launch.launcher import main

if __name__ == '__main__':
    main()
