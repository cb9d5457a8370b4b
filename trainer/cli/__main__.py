from trainer.cli.app import main

main()
