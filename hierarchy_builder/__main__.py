from hierarchy_builder.cli import main

main()
