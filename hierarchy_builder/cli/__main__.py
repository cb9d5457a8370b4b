from hierarchy_builder.cli.app import main

main()
